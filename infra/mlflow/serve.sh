#!/usr/bin/env bash
# MLflow's server with its records in PostgreSQL and its artifacts in an object store, both behind its own door: clients log
# in here, and hold no credentials of either.
#
# Takes PGHOST, PGUSER, PGDATABASE, MLFLOW_S3_ENDPOINT_URL, ARTIFACTS (s3://bucket/folder), MLFLOW_SERVER_ALLOWED_HOSTS, and
# the secrets below, each as NAME, or as a file's path in NAME_FILE.
set -euo pipefail

readonly SECRETS=(PGPASSWORD AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY)

for name in "${SECRETS[@]}"; do
  file=${name}_FILE
  if [[ -n ${!file:-} ]]; then
    export "$name=$(<"${!file}")"
  fi
  if [[ -z ${!name:-} ]]; then
    echo "serve.sh: no $name: give it, or a file's path in ${name}_FILE" >&2
    exit 2
  fi
done

# The password stays in the environment, where libpq finds it, and out of every address that could be logged.
readonly STORE="postgresql+psycopg://$PGUSER@$PGHOST:${PGPORT:-5432}/$PGDATABASE"
umask 077
cat > "${TMPDIR:-/tmp}/auth.ini" <<INI
[mlflow]
default_permission = READ
database_uri = $STORE
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
export MLFLOW_AUTH_CONFIG_PATH=${TMPDIR:-/tmp}/auth.ini

python "$(dirname "$0")/bucket.py" "$ARTIFACTS"
exec mlflow server --app-name basic-auth --host 0.0.0.0 --port "${PORT:-5000}" \
  --backend-store-uri "$STORE" --artifacts-destination "$ARTIFACTS" --workers "${WORKERS:-2}"
