"""Rendered receipts."""
