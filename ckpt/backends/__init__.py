"""Stores: the interface, folders, object stores, encryption, and several stores as one."""
