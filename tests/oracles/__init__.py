"""The definitions in float64, written from the papers; no module here imports normlab.

N1 to N18 number the layers, K1 to K13 the capabilities.
"""
