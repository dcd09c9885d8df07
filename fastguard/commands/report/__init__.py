"""`fastguard report`: the records of a run as one offline HTML page."""
