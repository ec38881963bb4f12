"""Building datasets: photos and public sets in, parquet shards with a card out. The scripts are in data_preparation/."""
