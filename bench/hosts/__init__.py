"""Emulated hosts: network namespaces of this machine."""
