"""The pieces of ``train_lm.py``: text, model, training loop, checkpoints, and what is reported."""
