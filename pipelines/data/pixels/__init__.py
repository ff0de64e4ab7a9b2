"""From the bytes of an image or a video to uint8 pixels of a fixed size."""
