"""Cheap adaptation of a frozen model: adapters that are trained, exchanged and merged.

May import train and everything below. Preference tuning and reward models are not here yet.
"""
