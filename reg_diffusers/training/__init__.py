"""The parts of a training that train_reg.py combines: terms, weights, monitors, previews and reports."""
