"""Building datasets: photos and public sets in, parquet shards with a card out. Scripts: data_preparation/."""
