"""Tables and pictures, made from JSON."""
