package main

//go:generate sh -c "go run . bootstrap > ../envoy/sidecar.yaml"
//go:generate sh -c "go run . bootstrap -sotw > ../envoy/sidecar-sotw.yaml"
