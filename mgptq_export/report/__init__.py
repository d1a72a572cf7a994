"""What a package tells of itself: ``report.html`` to look at and ``README.md``, the model card."""

from mgptq_export.report.card import CARD_FILE, model_card
from mgptq_export.report.content import PackageContent
from mgptq_export.report.page import REPORT_FILE, report_page, sweep_page

__all__ = ["CARD_FILE", "REPORT_FILE", "PackageContent", "model_card", "report_page", "sweep_page"]
