"""Raw samples: the accepted formats, and how files are joined to samples."""
