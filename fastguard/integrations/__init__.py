"""fastguard inside the trainers that people already use; one module a framework, imported on
demand.
"""
