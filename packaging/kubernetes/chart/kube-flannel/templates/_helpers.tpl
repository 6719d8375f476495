{{/* net-conf.json: a dict that is written as JSON once it is complete, so that no value can break the syntax. */}}
{{- define "flannel.netConf" -}}
{{- $flannel := .Values.flannel -}}
{{- $conf := dict "EnableNFTables" ($flannel.enableNFTables | default false) -}}
{{- if .Values.podCidr -}}
{{- $_ := set $conf "Network" .Values.podCidr -}}
{{- else -}}
{{- $_ := set $conf "EnableIPv4" false -}}
{{- end -}}
{{- if .Values.podCidrv6 -}}
{{- $_ := set $conf "IPv6Network" .Values.podCidrv6 -}}
{{- $_ := set $conf "EnableIPv6" true -}}
{{- end -}}
{{- if not (or .Values.podCidr .Values.podCidrv6) -}}
{{- fail "podCidr, podCidrv6 or both must be set: the cluster's pod network" -}}
{{- end -}}
{{- $known := dict
  "vxlan" (dict "backendPort" "Port" "mtu" "MTU" "vni" "VNI" "GBP" "GBP" "directRouting" "DirectRouting"
    "macPrefix" "MacPrefix")
  "udp" (dict "backendPort" "Port")
  "wireguard" (dict "backendPort" "ListenPort" "backendPortv6" "ListenPortV6" "mtu" "MTU" "psk" "PSK" "tunnelMode" "Mode"
    "keepaliveInterval" "PersistentKeepaliveInterval")
  "ipip" (dict "directRouting" "DirectRouting")
  "ipsec" (dict "psk" "PSK")
-}}
{{- $backend := dict "Type" $flannel.backend -}}
{{- range $value, $key := (get $known (lower $flannel.backend) | default dict) -}}
{{- $given := get $flannel $value -}}
{{- /* unset is absent, null or an empty text; false and 0 are values */ -}}
{{- if not (or (not (hasKey $flannel $value)) (kindIs "invalid" $given) (eq (toString $given) "")) -}}
{{- $_ := set $backend $key $given -}}
{{- end -}}
{{- end -}}
{{- $_ := set $conf "Backend" $backend -}}
{{- toPrettyJson $conf -}}
{{- end -}}

{{/* cni-conf.json: a text stays as it is if it is JSON. */}}
{{- define "flannel.cniConf" -}}
{{- $given := .Values.flannel.cniConf -}}
{{- $conf := $given -}}
{{- if kindIs "string" $given -}}
{{- $conf = fromJson $given -}}
{{- end -}}
{{- if not (hasKey $conf "name") -}}
{{- fail (printf "flannel.cniConf must be a JSON object with a name: %s" (get $conf "Error" | default "there is none")) -}}
{{- end -}}
{{- kindIs "string" $given | ternary (trim (toString $given)) (toPrettyJson $conf) -}}
{{- end -}}

{{- define "flannel.image" -}}
{{ .repository }}:{{ .tag }}
{{- end -}}
