"""
.. include:: choosing.md
.. include:: operating.md
.. include:: sizing.md
.. include:: comparison.md
"""
