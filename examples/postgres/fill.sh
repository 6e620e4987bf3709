#!/bin/sh
# fill.sh ROWS: adds rows to the table `orders` of the sample database.
set -eu
kubectl -n shop exec postgres-0 -c postgres -- psql -U postgres -d postgres -qv ON_ERROR_STOP=1 -c "
  create table if not exists orders (id bigserial primary key, customer text not null, amount numeric not null, placed timestamptz not null);
  insert into orders (customer, amount, placed)
    select md5(n::text), (n % 10000) / 100.0, timestamptz '2026-01-01' + n * interval '1 second' from generate_series(1, $1) n;"
