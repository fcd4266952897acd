"""What a person looks at: a contact sheet, an HTML page, and the files beside them."""

from .page import render_page
from .sheet import contact_sheet
from .write import write_report

__all__ = ["contact_sheet", "render_page", "write_report"]
