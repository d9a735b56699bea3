"""What is changed in documents, and which are left out."""
