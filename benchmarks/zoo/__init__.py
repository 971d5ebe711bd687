"""Public Linen models that ``corpus.py`` converts, as data, and what it asks of each."""
