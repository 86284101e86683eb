"""A page in the browser that draws, edits, takes apart and varies images: `nextscale web`."""
