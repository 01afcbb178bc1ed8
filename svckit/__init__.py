"""svckit: what makes a process one of our services.

Admission rule for this package: used by both services; knows no table, no Redis key and no message of either API.
"""
