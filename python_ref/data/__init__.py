"""Videos to learn from: moving digits made from real scans, folders of video files, and the prompts of evaluation."""
