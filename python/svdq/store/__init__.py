"""Storage of a layer's tokens: the window, packed pages, outliers, landmarks, drift."""
