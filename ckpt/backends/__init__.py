"""Stores: the interface of a backend, folders, object stores, encryption, and several stores as
one.
"""
