"""World models over diffusers: one file per image-conditioning family."""
