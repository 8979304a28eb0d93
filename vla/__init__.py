"""Small vision-language-action policies: an observation in, a chunk of robot actions out."""

__version__ = "0.1.0"
