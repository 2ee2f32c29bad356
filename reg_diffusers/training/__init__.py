"""The parts that train_reg.py puts together around its loop."""
