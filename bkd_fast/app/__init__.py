"""The application: what a person starts. Command line, typed configuration, data, models, the main job, its report."""
