"""`wheels fetch`: data sets that anybody can make anew from public sources."""
