"""Measures, comparisons with tests of significance, fusion, and reports."""
