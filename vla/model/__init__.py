"""The network: observations in robot units in, action chunks in robot units out."""
