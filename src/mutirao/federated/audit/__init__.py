"""What left a site: records in a chain (``record``), written (``log``), checked (``check``)."""
