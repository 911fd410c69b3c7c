"""Flower as transport: the one package in which it is imported.

The coordinator's side is Flower's own SuperLink with our ServerApp. A site's side is one
process of ours, ``site_agent``, that speaks the SuperLink's Fleet API through ``fleet``;
Flower's SuperNode, its SuperExec and its ClientApps, which would run what a coordinator
sends, are not used. ``records`` puts parcels into Flower's records and reads them back.
"""
