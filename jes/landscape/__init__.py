"""The fine-tuning landscape: its curvature, and what random steps in it find.

From 2602.00170; plain functions on numpy or jax arrays.
"""
