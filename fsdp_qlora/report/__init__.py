"""What a run did and is doing: reads run folders, writes report.html, draws the dashboard of `watch`. No torch."""
