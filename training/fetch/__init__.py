"""`wheels fetch`: makes data sets from public sources, so that anybody can make them again."""
