"""`wheels bench`: how fast and how good, compared with what people would use instead."""
