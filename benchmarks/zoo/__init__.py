"""Public Linen models that ``corpus.py`` converts: small configurations, one file a source."""
