"""Measuring edits as the field does: metrics, protocols, intervals, pages. Scripts: evaluation/."""
