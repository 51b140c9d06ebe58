"""Adapters that put the score into other libraries, one file each, imported as ``vqr1_metric.integrations``.

The folder lies beside the package so that an adapter is easy to find and to copy; setuptools maps it to
``vqr1_metric.integrations``. Never import it as ``integrations``: that would be a second copy of every module.
Each adapter imports its library only when it is itself imported, so this package alone costs nothing.
"""
