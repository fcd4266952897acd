"""Attribution methods: from a query to scores."""
