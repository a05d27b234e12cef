"""Data in: files, Hugging Face data sets and shipped suites become records."""
