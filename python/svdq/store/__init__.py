"""What a layer of the cache holds: packed pages, window, outliers."""
