"""A whole Stable Diffusion in one file, as A1111, ComfyUI and kohya keep it, as a base."""
