"""`controlkit ui`: the studio page, on which pictures are made and adapters trained without a command line.

Needs the extra `ui` (gradio). Nothing of the library imports this package.
"""
