"""How good an attribution is."""
