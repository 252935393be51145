"""Pictures over time: mp4 in and out, views and canvas, scores of pictures."""
