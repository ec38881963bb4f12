"""Building datasets: photos and public sets in, parquet shards with a card out, for the scripts of data_preparation/."""
