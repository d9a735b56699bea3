"""Cleaning: changes to documents, and rules that drop them."""

from data_prep.cleaning.cleaner import Cleaner, CleaningReport
from data_prep.cleaning.decontamination import EvaluationTexts
from data_prep.cleaning.duplicates import find_duplicates, signatures

__all__ = ["Cleaner", "CleaningReport", "EvaluationTexts", "find_duplicates", "signatures"]
