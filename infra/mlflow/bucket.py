"""Make an artifact destination's bucket where there is none yet, waiting up to a minute for the storage to answer."""

import os
import sys
import time

import boto3
from botocore.exceptions import ClientError, EndpointConnectionError, HTTPClientError


def main(destination: str) -> None:
    bucket = destination.removeprefix("s3://").split("/")[0]
    client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
    for second in range(60):
        try:
            client.create_bucket(Bucket=bucket)
        except (EndpointConnectionError, HTTPClientError) as error:
            if second == 59:
                sys.exit(f"bucket.py: the object store doesn't answer: {error}")
            time.sleep(1)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                return
            sys.exit(f"bucket.py: no bucket {bucket}: {error}")
        else:
            return


main(sys.argv[1])
