"""What a training says of itself: whether control is learned, scores, curves, the report and the card."""
