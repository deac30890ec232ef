"""Engines installed, machines checked and servers launched, before anything is served."""
